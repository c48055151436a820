"""Which indices of which tensors are the same unit: the rules, applied to a whole graph."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from pyro_bmr.structure.calls import ELEMENTWISE, Call, Rule, broadcast, combine, create, protect_all
from pyro_bmr.structure.capture import Capture
from pyro_bmr.structure.contractions import CONTRACTIONS
from pyro_bmr.structure.indexing import INDEXING
from pyro_bmr.structure.labels import Ints, Labelled, Labels, Origin
from pyro_bmr.structure.reductions import REDUCTIONS

from pyro_bmr.structure.units import Structure
