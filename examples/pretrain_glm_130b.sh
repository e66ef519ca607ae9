#!/usr/bin/env bash
# GLM-130B's configuration to the letter (arXiv 2210.02414, table 11): 96 nodes of 8 GPUs,
# TP 4 x PP 8 x DP 24, fp16, batch 192 to 4224.
#
#   NODE_RANK=... MASTER_ADDR=... DATA="0.6 /data/en_text_document 0.4 /data/zh_text_document" \
#   MULTITASK_DATA=/data/mip TOKENIZER=/data/ice_text.model CHECKPOINTS=/ckpt \
#   examples/pretrain_glm_130b.sh [more flags, which override these]
#
#   DRY_RUN=1 examples/pretrain_glm_130b.sh    builds every stage without data, weights or GPUs and
#                                              prints its parameters
#   PLAN=1 examples/pretrain_glm_130b.sh       says what it will take: memory of every stage, step
#                                              time, days (GPU=H200 for others than A100-40G,
#                                              --search for the best layout on the cluster)
set -euo pipefail
cd "$(dirname "$0")/.."

NUM_NODES=${NUM_NODES:-96}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

# 70 layers on 8 stages: 9 each, one fewer on the first and last, which hold the embedding.
MODEL=(
    --glm-preset 130b
    --rotary-angle-dtype fp16 # of the released model; drop it for a run from scratch
    --hidden-dropout 0.1
    --attention-dropout 0.1
)
PARALLEL=(
    --tensor-model-parallel-size 4
    --pipeline-model-parallel-size 8
    --decoder-first-pipeline-num-layers 8
    --decoder-last-pipeline-num-layers 8
    --use-distributed-optimizer
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)
# 450 billion tokens in sequences of 2048. The schedule in samples follows from it: warm-up over
# 0.5%, batch ramp over 2.5%, decay over 90%.
TRAIN_SAMPLES=219726562
TRAINING=(
    --micro-batch-size 1
    --global-batch-size 4224
    --rampup-batch-size 192 24 $((TRAIN_SAMPLES * 25 / 1000))
    --train-samples $TRAIN_SAMPLES
    --lr 8e-5
    --min-lr 8e-6
    --lr-decay-style cosine
    --lr-decay-samples $((TRAIN_SAMPLES * 90 / 100))
    --lr-warmup-samples $((TRAIN_SAMPLES * 5 / 1000))
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --weight-decay 0.1
    --clip-grad 1.0
    --fp16
    # 65536 in the paper is for the mean over a micro-batch, which here is a sum until the end of
    # the step; as the first scale it costs some ten skipped steps, --initial-loss-scale 64 none.
    --initial-loss-scale 65536 --loss-scale-window 2000 --hysteresis 2
    --shrink-embedding-gradient-alpha 0.1
)
OBJECTIVE=(
    --gpt-prob 0.7
    --mask-prob 0.15
    --average-block-length 3
    --min-gmask-ratio 0.2
    --short-seq-prob 0.02
    --single-span-prob 0.02
    --aggregated-samples-per-sequence 4
    --multitask-ratio 0.05
    --split 949,50,1
)
LOGGING=(
    --log-interval 1
    --log-throughput
    --save-interval 250
    --eval-interval 1000
    --eval-iters 3
)

if [[ -n ${PLAN:-} ]]; then
    exec "${PYTHON:-.venv/bin/python}" tools/plan_run.py \
        --gpu "${GPU:-A100-40G}" --nodes "$NUM_NODES" --gpus-per-node "$GPUS_PER_NODE" \
        "${MODEL[@]}" "${PARALLEL[@]}" "${TRAINING[@]}" "${OBJECTIVE[@]}" "${LOGGING[@]}" "$@"
fi
if [[ -n ${DRY_RUN:-} ]]; then
    exec "${PYTHON:-.venv/bin/python}" tools/dry_run.py \
        --world-size $((NUM_NODES * GPUS_PER_NODE)) \
        "${MODEL[@]}" "${PARALLEL[@]}" "${TRAINING[@]}" "${OBJECTIVE[@]}" "${LOGGING[@]}" "$@"
fi

: "${DATA:?the corpora: weights and prefixes for --data-path, as tools/preprocess_data.py wrote them}"
: "${MULTITASK_DATA:?the instruction data: prefixes for --multitask-data-path}"
: "${TOKENIZER:?the SentencePiece file of icetk}"
: "${CHECKPOINTS:?a directory that every node sees}"
read -ra DATA <<<"$DATA"
read -ra MULTITASK_DATA <<<"$MULTITASK_DATA"

exec torchrun --nnodes "$NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" \
    --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-6000}" \
    pretrain_glm.py \
    "${MODEL[@]}" "${PARALLEL[@]}" "${TRAINING[@]}" "${OBJECTIVE[@]}" "${LOGGING[@]}" \
    --tokenizer-type IceTokenizer --tokenizer-model "$TOKENIZER" \
    --data-path "${DATA[@]}" --multitask-data-path "${MULTITASK_DATA[@]}" \
    --data-cache-path "$CHECKPOINTS/data-cache" \
    --save "$CHECKPOINTS" --load "$CHECKPOINTS" \
    "$@"
