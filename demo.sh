#!/usr/bin/env bash
# `make demo`: the whole road on the embedded model. Nothing is downloaded, nothing is overwritten.
set -euo pipefail

bin=${BIN:-.venv/bin}
number=1
while [ -e "runs/demo-$number" ] || [ -e "exports/demo-$number" ]; do number=$((number + 1)); done
run=runs/demo-$number
out=exports/demo-$number
prompt="What does it mean to wait?"

say() { printf '\n== %s\n' "$*"; }
ask() { "$bin/brie" generate --prompt "$prompt" --max-tokens 60 --temperature 0.6 --seed 1 "$@"; }

say "1. A model to train: nano, Qwen2.5's architecture in small, made from the texts in data/"
if [ -d models/nano ]; then echo "models/nano is there already"; else "$bin/brie" nano models/nano; fi

say "2. Before: $prompt"
ask --model models/nano

say "3. LoRA by the recipe, on the rows in data/, with a rate that suits a small model"
"$bin/brie" train --model models/nano --out "$run" \
  -o learning_rate=3e-3 -o num_train_epochs=3 -o save_steps=20 -o eval_steps=15

checkpoint=$run/checkpoint-$(ls -d "$run"/checkpoint-* | sed "s/.*-//" | sort -n | tail -1)
say "4. After: $prompt"
ask --adapter "$checkpoint"

say "5. The bridge: a folder that PEFT loads"
"$bin/python" convert/to_peft.py "$checkpoint" "$out" --base-model brie/nano

cat <<END

That was the road on a model too small to be clever. On the real one:
  make train                      Qwen2.5-0.5B-Instruct on data/, the card's recipe (downloads 1 GB once)
  brie train --data your.jsonl    your own rows, {"messages": [...]} a line
  brie chat --adapter $checkpoint
  open $run/loss.svg      the curves of this run
END
