"""`mqformer synthesize`: generate masks and captions for boxes, as in section 3.4 of the MQ-Former paper."""
