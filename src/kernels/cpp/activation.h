// The activations of the MLPs, with their slopes.

#pragma once

#include "common.h"

struct QuickGelu {  // x sigmoid(1.702 x)
  static float share(float x) { return 1.0f / (1.0f + exponential(-1.702f * x)); }
  static float value(float x) { return x * share(x); }
  static float slope(float x) {
    const float s = share(x);
    return s * (1.0f + 1.702f * x * (1.0f - s));
  }
};

struct Gelu {  // x P(X < x), P the normal distribution, by erf's formula 7.1.26 of Abramowitz & Stegun
  static float below(float x) {
    const float a = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * a);
    float y = 1.061405429f;
    y = y * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    const float tail = 0.5f * y * t * exponential(-a * a);
    return x < 0.0f ? tail : 1.0f - tail;
  }
  static float value(float x) { return x * below(x); }
  static float slope(float x) { return below(x) + x * 0.39894228f * exponential(-0.5f * x * x); }
};
