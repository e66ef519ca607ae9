#!/usr/bin/env bash
# Train a small GLM from scratch on text of this machine, and let it fill blanks.
#
#     examples/quickstart.sh [WORK_DIR]        WORK_DIR: where everything goes, ./quickstart_run
#
# A stage whose output is complete is skipped: after Ctrl-C the same command goes on. For a better
# model give it longer, in a WORK_DIR of its own: QUICKSTART_STEPS=5000.
set -euo pipefail

work=${1:-quickstart_run}
mkdir -p "$work"
shown=$work
work=$(cd "$work" && pwd)
cd "$(dirname "$0")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then PATH=$PWD/.venv/bin:$PATH; fi

steps=${QUICKSTART_STEPS:-1200}
vocab_size=${QUICKSTART_VOCAB_SIZE:-2048}
roots=${QUICKSTART_ROOTS:-} # folders to take text from; the running Python's own where empty
seq_length=256
if [ "$steps" -lt 40 ]; then
    echo "quickstart: QUICKSTART_STEPS=$steps: must be at least 40, so that there is a curve" >&2
    exit 2
fi

settings="steps $steps, vocabulary $vocab_size, text from ${roots:-the running Python}"
if [ ! -e "$work/settings" ]; then
    echo "$settings" >"$work/settings"
elif [ "$(cat "$work/settings")" != "$settings" ]; then
    echo "quickstart: $shown was begun with other settings ($(cat "$work/settings"));" >&2
    echo "remove it, or name another folder: examples/quickstart.sh WORK_DIR" >&2
    exit 2
fi

export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # spinning is costly where others use the cores
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    # torchrun would set 1, for many processes a machine. More than 8 only wait for each other here.
    OMP_NUM_THREADS=$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
    export OMP_NUM_THREADS
fi

trap 'echo; echo "Stopped. The same command goes on from here."; exit 130' INT TERM
mkdir -p "$work/done"
begin() { # NAME TITLE: true where the stage is still to be done
    echo
    echo "== $2"
    if [ -e "$work/done/$1" ]; then
        echo "  (done before)"
        return 1
    fi
}
finish() { touch "$work/done/$1"; }

tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/tokenizer.json")
device=$(python -m megatron_glm.device) precision=()
if [ "$device" = gpu ]; then precision=(--bf16); fi
training=(
    # A model that sees enough tokens in minutes: some 0.9 million parameters.
    --glm-preset tiny --num-layers 3 --hidden-size 128 --ffn-hidden-size 384
    --seq-length "$seq_length" "${tokenizer[@]}"
    --train-data-path "$work/data/train_text_document"
    --valid-data-path "$work/data/valid_text_document"
    --data-cache-path "$work/data/cache" --num-workers 1
    # Half of the sequences for each objective, and twice as many blanks as GLM-130B had: each of
    # these few tokens is to teach something. [MASK] samples have 128 tokens.
    --gpt-prob 0.5 --mask-prob 0.3 --aggregated-samples-per-sequence 2
    --train-iters "$steps" --global-batch-size 8 --micro-batch-size 8 "${precision[@]}"
    # GLM-130B's word embedding, 0.0052, would take most of these steps to grow to a useful size.
    --lr 2e-3 --min-lr 1e-4 --lr-warmup-iters $((steps / 40)) --init-method-std 0.05
    --attention-dropout 0 --hidden-dropout 0
    # One step late, so that the last evaluation is the one after the end.
    --eval-interval $((steps / 6 + 1)) --eval-iters 20
)
prompts=(
    'Raises a ValueError if the argument [MASK] not a string.'
    'input_ids (`torch.LongTensor` of shape `([MASK], sequence_length)`): Indices of input tokens.'
    'hidden_size (`int`, *optional*, defaults to 768): [gMASK]'
)

train() { # FLAGS: trains on from the last checkpoint, if there is one
    torchrun --standalone --nproc-per-node 1 pretrain_glm.py "${training[@]}" \
        --save "$work/checkpoint" --load "$work/checkpoint" --save-interval $((steps / 6)) \
        --log-interval $((steps / 40)) --tensorboard-dir "$work/tensorboard" "$@" 2>&1 |
        python tools/show_progress.py --log "$work/train.log" --seq-length "$seq_length" || {
        echo "quickstart: the run failed; the whole of its log is $shown/train.log" >&2
        exit 1
    }
}
reached() { # the last step that was saved
    local step
    step=$(cat "$work/checkpoint/latest_checkpointed_iteration.txt" 2>/dev/null) || true
    echo "${step:-0}"
}
fail() { # LOG
    echo "quickstart: this stage failed; the end of $1:" >&2
    tail -n 25 "$1" >&2
    exit 1
}

if begin text "1/8 Gather text: the documentation of Python and of the installed packages"; then
    root_flags=()
    for root in $roots; do root_flags+=(--root "$root"); done
    python tools/gather_text.py --output-dir "$work/text" --valid-ratio 0.02 "${root_flags[@]}"
    finish text
fi
if begin tokenizer "2/8 Train a tokenizer on it: byte-level BPE"; then
    python tools/train_tokenizer.py --input "$work/text/train.jsonl" \
        --vocab-size "$vocab_size" --output "$work/tokenizer.json" --overwrite
    finish tokenizer
fi
if begin data "3/8 Turn the text into token ids, in Megatron's format"; then
    mkdir -p "$work/data"
    for part in train valid; do
        python tools/preprocess_data.py --input "$work/text/$part.jsonl" "${tokenizer[@]}" \
            --append-eod --output-prefix "$work/data/$part" --overwrite
    done
    finish data
fi
if begin baseline "4/8 Measure what guessing by word frequency alone would lose, on held-out text"; then
    python tools/measure_unigram.py --output "$work/baseline.json" "${training[@]}" \
        >"$work/baseline.log" 2>&1 || fail "$work/baseline.log"
    grep '^unigram model' "$work/baseline.log" | sed 's/^/  /'
    finish baseline
fi
if begin first_half "5/8 Train on the $device, filling [MASK] and [gMASK] blanks, and stop half way"; then
    # A run may have been stopped between its last save and its end.
    if [ "$(reached)" -lt $((steps / 2)) ]; then train --exit-interval $((steps / 2)); fi
    finish first_half
fi
if begin second_half "6/8 Resume from the checkpoint, and train to the end"; then
    if [ "$(reached)" -lt "$steps" ]; then train; else train --skip-train; fi
    finish second_half
fi
if begin plot "7/8 Draw the losses"; then
    python tools/plot_losses.py "$work/train.log" --baseline "$work/baseline.json" \
        --output "$work/losses.png"
    finish plot
fi
if begin blanks "8/8 Let it fill three blanks: what it wrote stands between ⟦ and ⟧"; then
    python tools/generate.py --load "$work/checkpoint" "${tokenizer[@]}" --max-new-tokens 24 \
        --prompt "${prompts[0]}" --prompt "${prompts[1]}" --prompt "${prompts[2]}" \
        >"$work/blanks.txt" 2>"$work/blanks.log" || fail "$work/blanks.log"
    finish blanks
fi
sed 's/^/  /' "$work/blanks.txt"

echo
echo "== What it learned"
verdict=0
python tools/compare_baseline.py "$work/train.log" --baseline "$work/baseline.json" || verdict=$?
cat <<EOF

checkpoint   $shown/checkpoint
log          $shown/train.log
loss plot    $shown/losses.png
TensorBoard  tensorboard --logdir $shown/tensorboard
EOF
if [ "$verdict" = 0 ]; then
    echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s;" \
        "the held-out loss of both objectives is below the unigram model's"
else
    echo "quickstart: the model has not learned enough; give it longer with QUICKSTART_STEPS" >&2
fi
exit "$verdict"
