"""What a person sees: progress and plots."""
