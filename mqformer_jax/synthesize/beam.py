"""The same work as an Apache Beam pipeline, for clusters (`pip install -e '.[beam]'`): a shard is an element."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as e:
    raise ValueError(f"--beam: {e.name} is not installed: pip install -e '.[beam]'.") from e

from mqformer_jax.synthesize.makers import Maker, make_maker
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.shard import make_shard
from mqformer_jax.synthesize.work import Work, begun, finish


def _make(work: Work, asked: tuple[Any, ...], shard: int) -> int:
    """In a worker. A teacher is loaded once a process."""
    make_shard(work.source, shard, work.path(shard), _maker(asked), work.batch)
    return shard


@functools.cache
def _maker(asked: tuple[Any, ...]) -> Maker:
    return make_maker(*asked)


def run_pipeline(work: Work, asked: tuple[Any, ...], options: Sequence[str]) -> Tally | None:
    """Makes all shards in the pipeline's workers, then the set here. asked: of `make_maker`. options: Beam's own flags.

    The folder of records must be one that the workers see too.
    """
    with begun(work), beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        shards = pipeline | "shards" >> beam.Create(range(len(work.source.paths)))
        shards | "spread" >> beam.Reshuffle() | "make" >> beam.Map(functools.partial(_make, work, asked))
    return finish(work, _maker(asked))
