"""`traincert explorer`: a page over one or several nodes. It only reads; the visitor's browser checks the blocks."""
