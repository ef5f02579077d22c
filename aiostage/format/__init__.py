"""What a checkpoint says and how it is spelled: pure, without files, event loops or threads."""
