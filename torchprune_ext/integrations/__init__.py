"""Callbacks for the trainers people use; each module needs the library it is called after."""
