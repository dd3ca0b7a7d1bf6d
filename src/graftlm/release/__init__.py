"""What leaves: figures, exports, the report."""
