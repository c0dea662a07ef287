"""What users would otherwise pick, doing the same work on the same machine, in turn with ours."""
