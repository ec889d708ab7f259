"""What becomes of a pruned model after pruning: files."""

from torchprune_ext.deploy.sparse_files import load_sparse, save_sparse

__all__ = ["load_sparse", "save_sparse"]
