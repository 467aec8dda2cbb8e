// The rules in words, in the order in which a block is checked. Those of SPEC.md have the node's names.

/** Rule → what it says, as one sentence. */
export const RULES = {
  network: "The network's options give its chain_id, and it is the one that you trust.",
  hash: 'The bytes of the block have the hash that was asked for.',
  merkleroot: 'The header commits to exactly these transactions.',
  'coinbase-height': 'The first transaction names the height of this block.',
  'bad-traincert-missing': 'The first transaction carries a training certificate.',
  'bad-traincert-multiple': 'It carries only one.',
  'bad-traincert-parse': 'The bytes of the certificate have the only form that is allowed.',
  'bad-traincert-version': "The certificate's version is known.",
  'bad-traincert-height': 'The certificate is for this height.',
  'bad-traincert-prevblock': 'The certificate is for a block on this parent.',
  'bad-traincert-totals': "The number of the cycle's contributions, their weight and their root are all zero, or none is.",
  'bad-traincert-coordinator-sig': 'As many coordinator keys as are needed have signed the certificate.',
  'bad-traincert-winner-sig': 'The winner has signed this very block.',
  parent: 'The bytes of the parent have the hash that this block names, and it carries a certificate if it must.',
  'bad-traincert-award': "The winner was drawn if the parent's table has contributions, and else appointed.",
  'bad-traincert-weight': "The winner's weight in the lottery follows from its work.",
  'bad-traincert-draw': "The ticket that was drawn falls on the winner's place in the parent's table.",
  'bad-traincert-beacon': 'The random value of the draw was fixed before: its hash is what the parent revealed.',
  'bad-traincert-model': "Training started from the parent's model.",
  'bad-traincert-round': 'The winner was not drawn again before the wait was over.',
  shown: 'This page shows what the block says.',
};

/** State of a block → what stands beside it, and what that means. */
export const STATES = {
  waiting: ['· waiting', 'This block is not checked yet.'],
  checking: ['… checking', 'Your browser is checking this block.'],
  good: ['✓ checked', 'Your browser checked this block: every rule holds.'],
  bad: ['✗ broken', 'Your browser checked this block, and a rule is broken'],
  none: ['– no certificate', 'Below the start height blocks have no certificate. Your browser checked its header and transactions.'],
  unknown: ['? unknown', 'Your browser could not check all of this block'],
};
