// The bytes of a block: header, transactions, Merkle root, and what the winner signs. The twins are
// bridge/consensus/block.py and, for what Python leaves to its library, Bitcoin Core.

import { SIGNATURE_SIZE } from './certificate.js';
import { EncodingError, Reader, concat, encodeUint, equal, hash256, hex, readList, reversedHex, taggedHash } from './codec.js';
import { BrokenRule } from './errors.js';
import { GENESIS_HASH } from './params.js';

const HEADER_SIZE = 80;
const NO_OUTPOINT = concat(new Uint8Array(32), [0xff, 0xff, 0xff, 0xff]); // what a coinbase spends
const OP_RETURN = 0x6a;
const OP_PUSHDATA = { 0x4c: 1, 0x4d: 2, 0x4e: 4 }; // opcode → bytes of the length that follows it

/** The hash of a header, the first 80 bytes of a block, as RPC shows it. */
export const blockHash = (bytes) => reversedHex(hash256(bytes.subarray(0, HEADER_SIZE)));

/** Read a block's bytes. Throws EncodingError unless they have exactly the form that a node writes. */
export function parseBlock(bytes) {
  const reader = new Reader(bytes);
  reader.take(4); // the version
  const block = { hash: blockHash(bytes), size: bytes.length, prevBlock: reader.take(32), merkleRoot: reader.take(32) };
  block.time = reader.uint(4);
  reader.take(8); // nBits and nonce
  block.header = bytes.subarray(0, HEADER_SIZE);
  block.transactions = readList(reader, () => readTransaction(reader));
  if (reader.left()) throw new EncodingError(`${reader.left()} bytes after the last transaction`);
  return block;
}

/**
 * Read a transaction. `stripped` are its bytes without the witnesses, of which txids are hashes. Each output has its script, and
 * where the script ends in `stripped`.
 */
function readTransaction(reader) {
  const version = reader.take(4);
  const segwit = reader.data[reader.position] === 0;
  if (segwit && !equal(reader.take(2), [0, 1])) throw new EncodingError(`unknown flag of a transaction at ${reader.position}`);
  const start = reader.position;
  const inputs = readList(reader, () => {
    const input = { prevout: reader.take(36), script: reader.take(reader.compactSize()) };
    reader.take(4); // the sequence number
    return input;
  });
  const outputs = readList(reader, () => {
    reader.take(8); // the amount
    return { script: reader.take(reader.compactSize()), end: version.length + reader.position - start };
  });
  const body = reader.data.subarray(start, reader.position);
  if (segwit) {
    const witnesses = inputs.map(() => readList(reader, () => reader.take(reader.compactSize())));
    if (witnesses.every((stack) => stack.length === 0)) throw new EncodingError('a transaction with empty witnesses only');
  }
  return { inputs, outputs, stripped: concat(version, body, reader.take(4)) };
}

export const txid = (transaction) => hash256(transaction.stripped);

/**
 * The Merkle root over some hashes, and whether two neighbours are the same: then another list of transactions has the same root
 * (CVE-2012-2459).
 */
export function computeMerkleRoot(hashes) {
  let level = hashes;
  let mutated = false;
  while (level.length > 1) {
    const above = [];
    for (let i = 0; i < level.length; i += 2) {
      if (i + 1 < level.length && equal(level[i], level[i + 1])) mutated = true;
      above.push(hash256(concat(level[i], level[i + 1] ?? level[i])));
    }
    level = above;
  }
  return { root: level[0], mutated };
}

/** The 32 bytes that the winner signs. `output` is the number of the coinbase output with the payload. */
export function winnerSighash(block, output, chainId) {
  const coinbase = block.transactions[0];
  const blank = coinbase.stripped.slice();
  const { end } = coinbase.outputs[output];
  blank.fill(0, end - SIGNATURE_SIZE, end);
  const { root } = computeMerkleRoot([hash256(blank), ...block.transactions.slice(1).map(txid)]);
  return taggedHash('traincert/block', chainId, block.header.subarray(0, 36), root, block.header.subarray(68));
}

/** What a script pushes, if it is OP_RETURN and a push, whatever follows; else null. */
export function pushAfterReturn(script) {
  const reader = new Reader(script);
  try {
    if (reader.uint(1) !== OP_RETURN) return null;
    const opcode = reader.uint(1);
    if (opcode > 0x4e) return null;
    return reader.take(opcode < 0x4c ? opcode : reader.uint(OP_PUSHDATA[opcode]));
  } catch (error) {
    if (error instanceof EncodingError) return null;
    throw error;
  }
}

/** The scriptPubKey that carries a payload of four bytes or more. */
export function payloadScript(payload) {
  const { length } = payload;
  if (length < 0x4c) return concat([OP_RETURN, length], payload);
  const opcode = [0x4c, 0x4d, 0x4e].find((each) => length < 256 ** OP_PUSHDATA[each]);
  return concat([OP_RETURN, opcode], encodeUint(length, OP_PUSHDATA[opcode]), payload);
}

// What the bridge has a node for. Each returns what it found, or throws BrokenRule.

/** Rule hash. */
export function checkHash(bytes, hash) {
  const found = blockHash(bytes);
  if (found !== hash) throw new BrokenRule('hash', `these bytes are of block ${found}, not of ${hash}`);
  return found;
}

/** Rule merkleroot. Returns the block, read. */
export function checkMerkleRoot(bytes) {
  const block = parsed(bytes);
  const [coinbase] = block.transactions;
  if (!coinbase) throw new BrokenRule('merkleroot', 'the block has no transactions');
  // Else a node of the tree, which has 64 bytes, could be shown as a transaction.
  if (!isCoinbase(coinbase)) throw new BrokenRule('merkleroot', 'the first transaction is no coinbase');
  const { root, mutated } = computeMerkleRoot(block.transactions.map(txid));
  if (mutated) throw new BrokenRule('merkleroot', 'transactions are there twice');
  if (!equal(root, block.merkleRoot)) {
    throw new BrokenRule('merkleroot', `the root is ${reversedHex(root)}, but the header's is ${reversedHex(block.merkleRoot)}`);
  }
  return block;
}

function parsed(bytes) {
  try {
    return parseBlock(bytes);
  } catch (error) {
    if (error instanceof EncodingError) throw new BrokenRule('merkleroot', `the bytes are no block: ${error.message}`);
    throw error;
  }
}

const isCoinbase = ({ inputs }) => inputs.length === 1 && equal(inputs[0].prevout, NO_OUTPOINT);

/** Rule coinbase-height: below the start height only the coinbase says how high a block is (BIP34). */
export function checkCoinbaseHeight(block, height) {
  const { script } = block.transactions[0].inputs[0];
  const prefix = heightPush(height);
  const right = height === 0 ? block.hash === GENESIS_HASH : equal(script.subarray(0, prefix.length), prefix);
  if (!right) throw new BrokenRule('coinbase-height', `the coinbase's script ${hex(script)} does not start with height ${height}`);
  return `height ${height}`;
}

/** The push of a height, as BIP34 has it. */
function heightPush(height) {
  if (height <= 16) return Uint8Array.of(0x50 + height);
  const bytes = [];
  for (let left = height; left > 0; left = Math.floor(left / 256)) bytes.push(left % 256);
  if (bytes.at(-1) >= 0x80) bytes.push(0); // else it would be negative
  return Uint8Array.of(bytes.length, ...bytes);
}
