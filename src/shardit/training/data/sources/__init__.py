"""Sources of items: folders, JSONL files, packages of data sets, drawn shapes; texts of captions."""
