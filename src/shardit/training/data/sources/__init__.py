"""Where items come from: folders, JSONL files, packages of data sets, drawn shapes; texts of captions."""
