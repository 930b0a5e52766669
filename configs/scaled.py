"""The mixture of configs/coco_ref.py, scaled up by synthetic masks and captions (paper, sec. 3.4).

Teacher models generate masks and captions for data sets with boxes. The comment after each `synthesize` command names
the data set that it writes.

    pip install -e '.[text,teachers]'
    mqformer prepare public coco_2017_panoptic coco_2017 lvis_v1 ade20k_panoptic refcoco refcocoplus refcocog \\
        visual_genome objects365_v2 --root ~/datasets --output data/records
    mqformer synthesize captions --data=coco_2017 --teacher=florence2:FOLDER                # coco_2017_syn
    mqformer synthesize masks --data=objects365_v2 --teacher=sam2:FOLDER                    # objects365_v2_syn_m
    mqformer synthesize captions --data=objects365_v2_syn_m --teacher=florence2:FOLDER \\
        --verifier=clip:FOLDER                                                              # objects365_v2_syn
    mqformer synthesize masks --data=visual_genome --teacher=sam2:FOLDER                    # visual_genome_syn_m
    mqformer train --config=scaled --workdir=runs/scaled

The pre-trained encoders, the model, the optimizer and the schedule are those of configs/coco_ref.py. The paper does not
publish its sampling ratios; here a data set is drawn in proportion to the square root of its size. Masks with a score
below 0.8 are used as boxes only.

- Hardware and time: those of configs/coco_ref.py; the time of the teachers is estimated in docs/benchmarks.md.
- Expected score: unknown, not yet run. The paper reports COCO PQ 58.8, mask AP 52.3 and RefCOCOg mIoU 68.2 for its
  final model, with a Swin backbone and more data.
"""

from ml_collections import ConfigDict
from mqformer_jax.configs import coco_ref


def get_config() -> ConfigDict:
    """Return the recipe."""
    config = coco_ref.full()
    config.data.mixture = (
        *config.data.mixture,
        dict(name="lvis_v1", split="train", tasks=("instance",)),
        dict(name="ade20k_panoptic", split="train", tasks=("panoptic", "semantic")),
        dict(name="coco_2017_syn", split="train", tasks=("instance", "referring")),
        dict(name="objects365_v2_syn", split="train", tasks=("instance", "referring"), min_mask_score=0.8),
        dict(name="visual_genome_syn_m", split="train", tasks=("instance", "referring"), min_mask_score=0.8),
    )
    config.eval.sets = (
        *config.eval.sets,
        dict(name="ade20k_panoptic", split="val", tasks=("panoptic", "semantic")),
    )
    return config
