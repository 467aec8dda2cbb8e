// Reads a chain of regtest blocks from standard input, one in hex a line, and checks each as bitcoinjs-lib does.
// Prints how many blocks and transactions it took; exits 1 at the first block that it refuses, with its number.
import { readFileSync } from 'node:fs';
import { Block } from 'bitcoinjs-lib';

const REGTEST_BITS = 0x207fffff;

function checkBlock(block, parent) {
  if (parent && Buffer.compare(block.prevHash, parent.getHash()) !== 0) return 'not on the block before';
  if (block.bits !== REGTEST_BITS) return 'wrong difficulty';
  if (!block.hasWitnessCommit()) return 'no witness commitment';
  if (!block.checkTxRoots()) return 'wrong Merkle root or witness commitment';
  if (!block.checkProofOfWork()) return 'not enough work';
  return null;
}

let parent = null;
const counts = { blocks: 0, transactions: 0 };
for (const hex of readFileSync(0, 'ascii').trim().split('\n')) {
  const block = Block.fromHex(hex);
  const fault = checkBlock(block, parent);
  if (fault) {
    console.error(`block ${counts.blocks + 1}: ${fault}`);
    process.exit(1);
  }
  if (block.toHex() !== hex) throw new Error(`block ${counts.blocks + 1}: serialized to other bytes`);
  counts.blocks += 1;
  counts.transactions += block.transactions.length;
  parent = block;
}
console.log(JSON.stringify(counts));
