"""Pruning methods that ``torch.nn.utils.prune`` does not have, in its own calls, hooks, buffers and containers."""

from torchprune_ext import calibration, criteria, masks, patterns, plots, schedules, selection
from torchprune_ext.compensation import (
    DenseValues,
    Fit,
    Refined,
    compensate,
    dense_values,
    prune_and_compensate,
    prune_in_rounds,
    recalibrate_bn,
    refine,
    sparsegpt,
)
from torchprune_ext.deploy.checkpoint import dense_state_dict, load_pruned_state_dict
from torchprune_ext.deploy.compact import DeadUnits, compact, dead_units
from torchprune_ext.deploy.compact_files import load_compact, save_compact
from torchprune_ext.deploy.compare import Comparison, compare
from torchprune_ext.deploy.copying import copy_pruned, copyable, refresh
from torchprune_ext.deploy.csr import CSRLinear, csr_report, to_csr
from torchprune_ext.deploy.freezing import frozen
from torchprune_ext.deploy.semi_structured import SemiStructuredLinear, semi_structured_report, to_semi_structured
from torchprune_ext.deploy.sparse_files import load_sparse, save_sparse
from torchprune_ext.deploy.zeros import keep_zeros
from torchprune_ext.discovery import bn_pairs, prunable_parameters
from torchprune_ext.functional import (
    block_ln,
    bn_scaling,
    every_other,
    gradient_magnitude,
    kernel_ln,
    nm_structured,
    obd_saliency,
    threshold,
    vector_ln,
)
from torchprune_ext.global_pruning import (
    global_block_ln,
    global_bn_scaling,
    global_gradient_magnitude,
    global_kernel_ln,
    global_ln_structured,
    global_nm_structured,
    global_obd_saliency,
    global_unstructured,
    global_vector_ln,
    mask_zeros,
)
from torchprune_ext.lifecycle import history, pruned_parameters, remove, remove_all, undo, undo_all
from torchprune_ext.methods import (
    BlockLn,
    BNScaling,
    EveryOther,
    GradientMagnitude,
    KernelLn,
    NMStructured,
    OBDSaliency,
    Threshold,
    VectorLn,
)
from torchprune_ext.patterns import NM, Block, Channel, Kernel, Vector
from torchprune_ext.penalties import bn_l1_penalty
from torchprune_ext.permutation import Permutation, permute_for_nm
from torchprune_ext.reporting import Report, report
from torchprune_ext.workflow import allocation
from torchprune_ext.workflow.dynamic import DynamicSparse
from torchprune_ext.workflow.fine_tune import fine_tune
from torchprune_ext.workflow.gradual import GradualPruner
from torchprune_ext.workflow.soft import SoftFilterPruner
from torchprune_ext.workflow.targets import plan, prune_to
from torchprune_ext.workflow.tickets import LotteryTicket

__version__ = "0.1.0"

__all__ = [
    "NM",
    "BNScaling",
    "Block",
    "BlockLn",
    "CSRLinear",
    "Channel",
    "Comparison",
    "DeadUnits",
    "DenseValues",
    "DynamicSparse",
    "EveryOther",
    "Fit",
    "GradientMagnitude",
    "GradualPruner",
    "Kernel",
    "KernelLn",
    "LotteryTicket",
    "NMStructured",
    "OBDSaliency",
    "Permutation",
    "Refined",
    "Report",
    "SemiStructuredLinear",
    "SoftFilterPruner",
    "Threshold",
    "Vector",
    "VectorLn",
    "allocation",
    "block_ln",
    "bn_l1_penalty",
    "bn_pairs",
    "bn_scaling",
    "calibration",
    "compact",
    "compare",
    "compensate",
    "copy_pruned",
    "copyable",
    "criteria",
    "csr_report",
    "dead_units",
    "dense_state_dict",
    "dense_values",
    "every_other",
    "fine_tune",
    "frozen",
    "global_block_ln",
    "global_bn_scaling",
    "global_gradient_magnitude",
    "global_kernel_ln",
    "global_ln_structured",
    "global_nm_structured",
    "global_obd_saliency",
    "global_unstructured",
    "global_vector_ln",
    "gradient_magnitude",
    "history",
    "keep_zeros",
    "kernel_ln",
    "load_compact",
    "load_pruned_state_dict",
    "load_sparse",
    "mask_zeros",
    "masks",
    "nm_structured",
    "obd_saliency",
    "patterns",
    "permute_for_nm",
    "plan",
    "plots",
    "prunable_parameters",
    "prune_and_compensate",
    "prune_in_rounds",
    "prune_to",
    "pruned_parameters",
    "recalibrate_bn",
    "refine",
    "refresh",
    "remove",
    "remove_all",
    "report",
    "save_compact",
    "save_sparse",
    "schedules",
    "selection",
    "semi_structured_report",
    "sparsegpt",
    "threshold",
    "to_csr",
    "to_semi_structured",
    "undo",
    "undo_all",
    "vector_ln",
]
