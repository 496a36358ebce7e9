"""Hyper-parameters, a module for each method's, with the name of the method's module.

They import no torch, so that a configuration is refused as quickly as it is read. A method of another package has its
`Settings` beside its functions.
"""

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True)  # of every Settings: no unknown key, no silent conversion

Weight = Annotated[float, Field(ge=0, le=100)]  # beyond that it decides alone, and float32 has no room for it
