#!/usr/bin/env bash
# Install, then train, evaluate, export and use CvT on handwritten digits: about 2 minutes on two
# cores after the installation. PYTHON=... selects the interpreter, OUTPUT=... the run folder.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case ${1-} in
  "") ;;
  -h | --help) usage_of "$0"; exit ;;
  *) fail "$1: quickstart.sh takes no arguments; see --help" ;;
esac
case ${OUTPUT-} in "" | /*) ;; *) OUTPUT=$PWD/$OUTPUT ;; esac # before the cd
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment requirements.txt

run=${OUTPUT:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}
digits=$run/digits
step() { printf '\n== %s\n   %s\n' "$1" "${*:2}"; "${@:2}"; }

step "Train cvt_nano on 4,000 digits" "$PYTHON" train.py --config config/digits/cvt_nano.yaml --output "$run"
step "Evaluate on 1,000 held-out digits" "$PYTHON" eval.py --ckpt "$run/checkpoints/best.ckpt" --json "$run/eval.json"
step "Export, and compare the file with the checkpoint" "$PYTHON" export.py --ckpt "$run/checkpoints/best.ckpt" --format mindir --output "$run/cvt_nano.mindir"
step "Write held-out digits as PNG files" "$PYTHON" -c "import sys; from src.data.samples import write_samples; write_samples(sys.argv[1])" "$digits"
step "Classify them with the exported file" "$PYTHON" infer.py --model "$run/cvt_nano.mindir" --input "$digits" --json "$run/predictions.json"

cat <<TEXT

Files in $run:
  checkpoints/best.ckpt   the best weights          curves.png    loss and accuracy by epoch
  checkpoints/last.ckpt   state for --resume        metrics.jsonl the same as numbers
  cvt_nano.mindir(.json)  for deployment            eval.json     top-1, top-5, loss
  digits/                 the classified images     config.yaml   all settings of the run
Next:
  $PYTHON infer.py --model $run/cvt_nano.mindir --input YOUR_IMAGE.png
  $PYTHON train.py --config config/imagefolder/cvt_nano_64.yaml --data.path FOLDER   (FOLDER/train/CLASS/*.jpg, FOLDER/val/CLASS/*.jpg)
  bash scripts/run_tests.sh
TEXT
