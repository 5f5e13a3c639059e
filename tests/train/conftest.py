"""Small models on one thread: two cores are shared with others."""

import torch

torch.set_num_threads(1)
