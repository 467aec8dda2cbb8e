// The encodings of which certificates, tables and signatures are made (SPEC.md, "Notation"): the twin of
// bridge/consensus/codec.py. Integers are unsigned and little-endian; those of 64 bits are BigInts, others are Numbers.

import { sha256 } from '../vendor/noble-hashes-2.4.0/sha2.js';
import { Point, hashes, schnorr } from '../vendor/noble-secp256k1-3.2.0/index.js';

hashes.sha256 = sha256; // the curve's file has no synchronous hash of its own

export { sha256 };
export const U64_MAX = 2n ** 64n - 1n;

/** SHA-256 twice, as Bitcoin hashes headers and transactions. */
export const hash256 = (bytes) => sha256(sha256(bytes));

/** BIP340's tagged hash of a message, which is given in parts. */
export function taggedHash(tag, ...message) {
  const prefix = sha256(new TextEncoder().encode(tag));
  return sha256(concat(prefix, prefix, ...message));
}

export function concat(...parts) {
  const joined = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}

export const equal = (left, right) => left.length === right.length && left.every((byte, i) => byte === right[i]);

export const isZero = (bytes) => bytes.every((byte) => byte === 0);

export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');

/** Hex in the reversed order in which block hashes are shown. */
export const reversedHex = (bytes) => hex(bytes.slice().reverse());

/** The bytes that hex digits stand for, or null if the text is anything else. */
export function fromHex(text) {
  if (typeof text !== 'string' || !/^([0-9a-f]{2})*$/i.test(text)) return null;
  return Uint8Array.from({ length: text.length / 2 }, (_, i) => parseInt(text.slice(2 * i, 2 * i + 2), 16));
}

/** A Number or BigInt that fits, as `length` bytes. */
export function encodeUint(value, length) {
  return Uint8Array.from({ length }, (_, i) => Number((BigInt(value) >> BigInt(8 * i)) & 0xffn));
}

/** Bitcoin's CompactSize of a number below 2^32, in the shortest form, the only one that the node reads. */
export function compactSize(value) {
  if (value < 0xfd) return encodeUint(value, 1);
  if (value <= 0xffff) return concat([0xfd], encodeUint(value, 2));
  return concat([0xfe], encodeUint(value, 4));
}

/**
 * Whether a 64-byte BIP340 signature of a 32-byte message is by this x-only key (32 bytes). False also for bytes that are no
 * key. (Also false for s = 0, unlike the node's library: nobody can find a message that such a signature is of.)
 */
export const verifySchnorr = (xonlyKey, message, signature) => schnorr.verify(signature, message, xonlyKey);

/** Whether 32 bytes are an x-only key. */
export function isXOnlyKey(bytes) {
  try {
    Point.fromBytes(concat([0x02], bytes));
    return true;
  } catch {
    return false;
  }
}

/** Bytes that are not of the form that is read. */
export class EncodingError extends Error {}

/** Reads fields from the front of some bytes. */
export class Reader {
  constructor(data) {
    this.data = data;
    this.position = 0;
  }

  /** The next `length` bytes. Throws EncodingError if fewer are left. */
  take(length) {
    const start = this.position;
    if (length > this.left()) throw new EncodingError(`${length} bytes expected at ${start}, ${this.left()} there`);
    this.position += length;
    return this.data.subarray(start, this.position);
  }

  /** An unsigned integer of `length` bytes: a BigInt if it has 8, else a Number. */
  uint(length) {
    const value = this.take(length).reduceRight((sum, byte) => (sum << 8n) | BigInt(byte), 0n);
    return length === 8 ? value : Number(value);
  }

  /** A CompactSize. Throws EncodingError unless it is in its shortest form, as the node does. */
  compactSize() {
    const start = this.position;
    const first = this.uint(1);
    const value = first < 0xfd ? first : this.uint({ 0xfd: 2, 0xfe: 4, 0xff: 8 }[first]);
    if (value >= 2 ** 32 || !equal(compactSize(value), this.data.subarray(start, this.position))) {
      throw new EncodingError(`non-canonical or oversized CompactSize at ${start}`);
    }
    return value;
  }

  /** How many bytes are not read yet. */
  left() {
    return this.data.length - this.position;
  }
}

/** The results of `read`, called as often as a CompactSize says that stands before. */
export function readList(reader, read) {
  const list = [];
  for (let left = reader.compactSize(); left > 0; left -= 1) list.push(read());
  return list;
}
