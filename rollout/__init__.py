"""Catalogue, trie, search and the engines that write items under a trie."""
