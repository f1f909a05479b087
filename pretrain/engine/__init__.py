"""How a step is taken: DeepSpeed ZeRO over ranks, or accelerate on one device."""
