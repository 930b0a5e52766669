"""Run a job as an Apache Beam pipeline, one element per shard. Needs `pip install 'mqformer_jax[beam]'`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as e:
    raise ValueError(f"--beam: {e.name} is not installed: pip install 'mqformer_jax[beam]'.") from e

from mqformer_jax.synthesize.annotators import Annotator, make_annotator
from mqformer_jax.synthesize.job import Job, finish, open_job
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.shard import make_shard


def _make(job: Job, options: tuple[Any, ...], shard: int) -> int:
    """Annotate one shard in a worker and return its number. Each process loads the teacher once."""
    make_shard(job.source, shard, job.path(shard), _annotator(options), job.batch)
    return shard


@functools.cache
def _annotator(options: tuple[Any, ...]) -> Annotator:
    return make_annotator(*options)


def run_pipeline(job: Job, options: tuple[Any, ...], beam_options: Sequence[str]) -> Tally | None:
    """Annotate all shards in the workers of a pipeline, then complete the data set in this process.

    Return the result of `job.finish`. options: the arguments of `make_annotator`. beam_options: Beam's own flags. The
    workers must have access to the folder of records.
    """
    with open_job(job), beam.Pipeline(options=PipelineOptions(list(beam_options))) as pipeline:
        shards = pipeline | "shards" >> beam.Create(range(len(job.source.paths)))
        shards | "spread" >> beam.Reshuffle() | "make" >> beam.Map(functools.partial(_make, job, options))
    return finish(job, _annotator(options))
