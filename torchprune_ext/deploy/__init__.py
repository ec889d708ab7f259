"""The life of a pruned model: copied, saved, loaded, trained and served, whatever method made its masks."""
