"""Picture files of folders and archives, hostile ones included."""
