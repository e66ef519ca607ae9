"""The best layouts of a job on a cluster: all that Megatron can start and that fit, by time."""

from collections.abc import Iterator
from itertools import product

from megatron_glm.planning.cluster import Cluster
from megatron_glm.planning.job import Job, PlanError
from megatron_glm.planning.memory import Overheads
from megatron_glm.planning.plan import Plan, Run

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CHUNKS = (None, 2, 3, 4, 5, 6)
RECOMPUTATIONS: tuple[dict, ...] = (
    {"recompute_granularity": None, "recompute_modules": ()},
    {"recompute_granularity": None, "recompute_modules": (), "glm_recompute_norms_and_geglu": True},
    {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    {"recompute_granularity": "selective", "recompute_modules": ("mlp",),
     "glm_recompute_norms_and_geglu": True},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
SPLITS: tuple[dict, ...] = (
    {},
    # One layer fewer on the first and the last stage, which hold the embedding, as GLM-130B has.
    {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
)


def layouts(job: Job, cluster: Cluster) -> Iterator[Job]:
    """Every layout that Megatron can start, of a job whose own layout does not matter."""
    world = cluster.world_size
    for t in _divisors(cluster.gpus_per_node):
        for p in _divisors(world // t):
            dp = world // t // p
            common = {
                "tensor_model_parallel_size": t, "pipeline_model_parallel_size": p,
                "data_parallel_size": dp, "sequence_parallel": t > 1,
                "use_distributed_optimizer": dp > 1, "overlap_grad_reduce": dp > 1,
                "overlap_param_gather": dp > 1, "decoder_first_pipeline_num_layers": None,
                "decoder_last_pipeline_num_layers": None, "recompute_method": None,
                "account_for_embedding_in_pipeline_split": False,
                "account_for_loss_in_pipeline_split": False, "recompute_num_layers": None,
                "distribute_saved_activations": False, "glm_recompute_norms_and_geglu": False,
            }  # fmt: skip
            several = p > 1
            for micro, chunks, split, recomputation in product(
                MICRO_BATCH_SIZES, CHUNKS if several else (None,),
                SPLITS if several else SPLITS[:1], RECOMPUTATIONS,
            ):  # fmt: skip
                try:
                    yield job.with_(
                        **common | split | recomputation,
                        micro_batch_size=micro,
                        virtual_pipeline_model_parallel_size=chunks,
                    )
                except PlanError:
                    continue


def best_plans(
    job: Job, cluster: Cluster, run: Run, overheads: Overheads, number: int = 10
) -> list[Plan]:
    """The fastest plans that fit, fastest first. Raises PlanError where none does.

    Among layouts of one tensor and pipeline parallel size and micro-batch size only the fastest
    counts: with less recomputation, or fewer chunks where these bring nothing.
    """
    plans = []
    for layout in layouts(job, cluster):
        try:
            plans.append(Plan(layout, cluster, run, overheads))
        except PlanError:
            continue
    if not plans:
        raise PlanError(
            f"--global-batch-size {job.global_batch_size} on {cluster.world_size} GPUs: no layout "
            "divides layers, heads and batch; change the batch or the number of nodes"
        )
    plans.sort(key=lambda plan: plan.time.step)
    chosen: dict[tuple, Plan] = {}
    for plan in plans:
        key = (plan.job.tensor_model_parallel_size, plan.job.pipeline_model_parallel_size,
               plan.job.micro_batch_size)  # fmt: skip
        if key not in chosen and plan.fits:
            chosen[key] = plan
        if len(chosen) == number:
            break
    if not chosen:
        nearest = min(plans, key=lambda plan: plan.memory_share)
        raise PlanError(
            f"--nodes {cluster.num_nodes}: no layout fits {cluster.gpu.name}; the smallest takes "
            f"{nearest.memory_share:.1f} times its memory; add nodes or GPUs with more memory"
        )
    return list(chosen.values())


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
