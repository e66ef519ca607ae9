"""The search: what it offers can be started, fits, and is what experience chose."""

from dataclasses import replace

import pytest

from megatron_glm.planning.cluster import Cluster, find_gpu
from megatron_glm.planning.job import PlanError
from megatron_glm.planning.memory import Overheads
from megatron_glm.planning.plan import Plan, Run
from megatron_glm.planning.report import as_json, flags, headline, memory_kinds, time_kinds
from megatron_glm.planning.search import best_plans, layouts
from tests.planning.jobs import GLM_130B, NORMS_AND_GEGLU, SMALL

PAPER = Cluster(find_gpu("A100-40G"), 96)


def search(job, cluster, **options):
    return best_plans(job, cluster, Run(samples=10**8), Overheads(), **options)


@pytest.fixture(scope="module")
def best():
    return search(GLM_130B, PAPER)


def test_the_papers_layout_is_among_the_best_on_its_cluster(best):
    # "The experiments show that the optimal tensor parallelism scale is t = 4" (appendix B.4).
    steps = {(plan.job.tensor_model_parallel_size, plan.job.pipeline_model_parallel_size):
             plan.time.step for plan in best}  # fmt: skip
    assert best[0].job.tensor_model_parallel_size == 4
    assert steps[4, 8] < 1.05 * best[0].time.step


def test_the_papers_layout_fits_its_cluster_without_recomputing_whole_layers():
    def fits(**changes):
        return Plan(GLM_130B.with_(recompute_granularity=None, **changes), PAPER).fits

    assert not fits()
    assert fits(**NORMS_AND_GEGLU)


def test_what_is_offered_fits_and_comes_by_time(best):
    assert len(best) == 10
    assert all(plan.fits for plan in best)
    steps = [plan.time.step for plan in best]
    assert steps == sorted(steps)
    assert all(plan.job.world_size == 768 for plan in best)


def test_no_layout_is_better_than_the_first(best):
    plans = []
    for job in layouts(GLM_130B, PAPER):
        try:
            plans.append(Plan(job, PAPER, Run(samples=10**8)))
        except PlanError:
            continue
    faster = [plan for plan in plans if plan.time.step < best[0].time.step]
    assert len(plans) > 500
    assert not any(plan.fits for plan in faster)


def test_less_memory_is_answered_by_more_parallelism_or_recomputation():
    cluster = Cluster(find_gpu("H200", memory=24 * 2**30), 96)
    plan = search(GLM_130B, cluster)[0]
    job = plan.job
    stages = job.tensor_model_parallel_size * job.pipeline_model_parallel_size
    assert job.recompute_granularity is not None or stages > 32


def test_a_cluster_that_is_too_small_is_told_so():
    with pytest.raises(PlanError, match="--nodes 2: no layout fits A100-40G.*add nodes"):
        search(GLM_130B, Cluster(find_gpu("A100-40G"), 2))


def test_a_batch_that_nothing_divides_is_told_so():
    with pytest.raises(PlanError, match="--global-batch-size 1 on 8 GPUs"):
        search(SMALL.with_(micro_batch_size=1, global_batch_size=1, num_attention_heads=1,
                           num_layers=1), Cluster(find_gpu("H100"), 1))


def test_kinds_sum_to_the_whole(best):
    plan = best[0]
    for forecast in plan.memory:
        assert sum(memory_kinds(forecast).values()) == forecast.total
    assert sum(time_kinds(plan).values()) == pytest.approx(plan.time.step)
    stored = as_json(plan)
    assert sum(stored["seconds"].values()) == pytest.approx(2 * plan.time.step)
    assert stored["memory"][0]["total"] == plan.memory[0].total


def test_a_plan_says_what_is_wrong_with_it():
    def warnings(cluster=PAPER, **changes):
        return " ".join(Plan(GLM_130B.with_(**changes), cluster).warnings)

    assert "does not fit: stage 0 lacks" in warnings(
        recompute_granularity=None, glm_fused_kernels=False, micro_batch_size=4
    )
    assert "few for 8 stages" in warnings(global_batch_size=24 * 16)
    assert "--sequence-parallel would save" in warnings()
    assert "--sequence-parallel" not in warnings(sequence_parallel=True)
    assert "--use-distributed-optimizer would share" in warnings(use_distributed_optimizer=False)
    assert "saves no memory" in warnings(
        recompute_granularity="selective", recompute_modules=("core_attn",)
    )
    assert "spans nodes" in warnings(Cluster(PAPER.gpu, 384, 2))
    tight = Cluster(find_gpu("A100-40G", memory=1.02 * Plan(GLM_130B, PAPER).fullest.total), 96)
    assert "tight: only" in warnings(tight)


def test_a_ramp_is_shared_by_the_ranks_or_rounded_or_refused():
    def rounds(*ramp) -> bool:
        plan = Plan(GLM_130B, PAPER, Run(samples=10**8, ramp=ramp))
        assert plan.days > 0
        return "--decrease-batch-size-if-needed" in flags(plan)

    # 24 ranks of one sequence.
    assert not rounds(192, 24, 10**6)
    assert rounds(200, 24, 10**6) and rounds(192, 32, 10**6)
    with pytest.raises(PlanError, match="--rampup-batch-size 16 8 1000000: .* at least 24, "):
        rounds(16, 8, 10**6)


def test_a_search_offers_only_what_can_begin_the_ramp():
    found = best_plans(GLM_130B, PAPER, Run(samples=10**8, ramp=(192, 24, 10**6)), Overheads())
    assert all(plan.job.smallest_batch <= 192 for plan in found)


def test_a_cluster_of_another_size_is_refused():
    with pytest.raises(PlanError, match="TP x PP x DP = 768 GPUs: --nodes 95 x .* has 760"):
        Plan(GLM_130B, Cluster(find_gpu("H200"), 95))


def test_the_headline_has_the_figures():
    text = "\n".join(headline(Plan(GLM_130B, PAPER, Run(samples=195_312_500))))
    assert "128.7B parameters on 96 x 8 A100-40G: TP 4 x PP 8 x DP 24" in text
    assert "176 micro-batches in 8 stages" in text and "(400B tokens)" in text


def test_flags_name_every_choice(best):
    words = flags(best[0])
    assert words[:2] == ["--tensor-model-parallel-size",
                         str(best[0].job.tensor_model_parallel_size)]
    assert "--sequence-parallel" in words and "--use-distributed-optimizer" in words
    job = best[0].job.with_(use_precision_aware_optimizer=True, exp_avg_dtype="bf16")
    added = [word for word in flags(replace(best[0], job=job)) if word not in words]
    assert added == ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16"]
