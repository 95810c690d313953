"""Convert ONNX files with MindSpore Lite and run them, as docs/deploy.md shows it; Python 3.7.

python lite_program.py FOLDER      for each NAME.onnx and NAME.npy there writes NAME.logits.npy
"""

import sys
from pathlib import Path

import mindspore_lite as lite
import numpy as np

for onnx in sorted(Path(sys.argv[1]).glob("*.onnx")):
    stem = str(onnx.with_suffix(""))
    converter = lite.Converter()
    converter.save_type = lite.ModelType.MINDIR_LITE
    converter.convert(lite.FmkType.ONNX, stem + ".onnx", stem)  # writes stem.ms
    context = lite.Context()
    context.target = ["cpu"]
    context.cpu.thread_num = 2
    model = lite.Model()
    model.build_from_file(stem + ".ms", lite.ModelType.MINDIR_LITE, context)
    images = np.load(stem + ".npy")  # float32 [B, 3, H, W]
    (given,) = model.get_inputs()
    given.set_data_from_numpy(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    (logits,) = model.predict([given])
    np.save(stem + ".logits.npy", logits.get_data_to_numpy())
