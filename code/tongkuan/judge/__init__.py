"""The judges' side: the contract of a result, and its similarity.py run under guard."""
