"""Which picture file belongs to which item, and the ledger of all of them."""
