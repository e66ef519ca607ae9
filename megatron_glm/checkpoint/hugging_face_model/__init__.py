"""What an exported checkpoint carries with it: files that stand alone, copied as they are."""
