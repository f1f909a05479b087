"""What all sections of a recipe are made of: a frozen model that refuses unknown keys, and the types of its fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

Pair = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInts = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
NonNegativeInts = Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
PositiveFloats = Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
