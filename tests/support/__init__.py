"""What several tests share: references, small models, ranks, a running server. A file is named for what it holds."""
