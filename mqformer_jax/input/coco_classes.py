"""COCO's classes: names in the order of detectron2's contiguous ids, and the category ids of the things."""

from __future__ import annotations

# The category ids of the 80 things, in order. COCO does not use the other ids from 1 to 90.
THING_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]

_THINGS = """
person | bicycle | car | motorcycle | airplane | bus | train | truck | boat | traffic light | fire hydrant | stop sign |
parking meter | bench | bird | cat | dog | horse | sheep | cow | elephant | bear | zebra | giraffe | backpack | umbrella
| handbag | tie | suitcase | frisbee | skis | snowboard | sports ball | kite | baseball bat | baseball glove |
skateboard | surfboard | tennis racket | bottle | wine glass | cup | fork | knife | spoon | bowl | banana | apple |
sandwich | orange | broccoli | carrot | hot dog | pizza | donut | cake | chair | couch | potted plant | bed | dining
table | toilet | tv | laptop | mouse | remote | keyboard | cell phone | microwave | oven | toaster | sink | refrigerator
| book | clock | vase | scissors | teddy bear | hair drier | toothbrush
"""
_STUFF = """
banner | blanket | bridge | cardboard | counter | curtain | door | floor wood | flower | fruit | gravel | house | light
| mirror | net | pillow | platform | playingfield | railroad | river | road | roof | sand | sea | shelf | snow | stairs
| tent | towel | wall brick | wall stone | wall tile | wall wood | water | window blind | window | tree | fence |
ceiling | sky | cabinet | table | floor | pavement | mountain | grass | dirt | paper | food | building | rock | wall |
rug
"""


def class_names(count: int) -> tuple[str, ...]:
    """Return the names of COCO's classes if `count` is 80 (things) or 133 (panoptic), else "class 0", "class 1", ...

    The option `--classes` of `mqformer convert` gives other names.
    """
    things, stuff = (tuple(" ".join(name.split()) for name in text.split("|")) for text in (_THINGS, _STUFF))
    return {80: things, 133: things + stuff}.get(count, tuple(f"class {i}" for i in range(count)))
