"""What an export with code of its own is made of: files that are copied, and never imported from here."""
