"""The paper's second lever: the mixture of configs/coco_ref.py, scaled by synthetic masks and captions on box-annotated
sets.

    mqformer prepare public coco_2017_panoptic coco_2017 lvis_v1 ade20k_panoptic refcoco refcocoplus refcocog
    visual_genome objects365_v2 mqformer synthesize captions --data=coco_2017
    --teacher=florence2:FOLDER                # coco_2017_syn mqformer synthesize masks
    --data=objects365_v2       --teacher=sam2:FOLDER                     # objects365_v2_syn_m python -m
    mqformer_jax.synthesize captions --data=objects365_v2_syn_m --teacher=florence2:FOLDER --pick=clip:FOLDER python -m
    mqformer_jax.synthesize masks    --data=visual_genome       --teacher=sam2:FOLDER                     #
    visual_genome_syn_m python -m mqformer_jax.main --config=configs/scaled.py --workdir=runs/scaled

Model, optimiser and schedule are those of configs/coco_ref.py. Sampling ratios are unpublished: size^0.5 here. Masks
below a score of 0.8 stay boxes. Not yet run at full size.
"""

from ml_collections import ConfigDict
from mqformer_jax.configs import coco_ref


def get_config() -> ConfigDict:
    config = coco_ref.full()
    config.data.mixture = (
        *config.data.mixture,
        dict(name="lvis_v1", split="train", tasks=("instance",)),
        dict(name="ade20k_panoptic", split="train", tasks=("panoptic", "semantic")),
        dict(name="coco_2017_syn", split="train", tasks=("instance", "referring")),
        dict(name="objects365_v2_syn", split="train", tasks=("instance", "referring"), least_mask=0.8),
        dict(name="visual_genome_syn_m", split="train", tasks=("instance", "referring"), least_mask=0.8),
    )
    config.eval.sets = (
        *config.eval.sets,
        dict(name="ade20k_panoptic", split="val", tasks=("panoptic", "semantic")),
    )
    return config
