// The training certificate: its fields, its bytes, and what is signed (SPEC.md, "The certificate"): the twin of
// bridge/consensus/certificate.py. Fields have the names of SPEC.md. Hashes are bytes, prev_block in header byte order.

import { EncodingError, hex, readList, reversedHex, taggedHash } from './codec.js';
import { CertificateError } from './errors.js';

const VERSION = 1;

/** Bytes of a BIP340 signature. */
export const SIGNATURE_SIZE = 64;

// The fields before the award, in the order of their bytes: an integer has its length in bytes, a hash has 0.
const FIELDS = {
  version: 1,
  height: 4,
  prev_block: 0,
  round: 2,
  beacon_reveal: 0,
  model_before: 0,
  model_after: 0,
  dataset_root: 0,
  record: 0,
  loss_before: 8,
  loss_after: 8,
  params_trained: 8,
  contributions_root: 0,
  contributions_weight: 8,
  contributions_count: 4,
  winner_key: 0,
};

/**
 * Read a certificate. `draw` is the winner's place in the parent's table, or null if the coordinator appointed it. `body` are the
 * bytes before the coordinator's signatures: only one form of them is read, so they are also what the coordinator signed.
 *
 * Throws CertificateError: -version for another version than 1, -parse for malformed bytes.
 */
export function readCertificate(reader) {
  const start = reader.position;
  const version = reader.left() ? reader.data[start] : VERSION;
  if (version !== VERSION) throw new CertificateError('version', `version ${version}, expected ${VERSION}`);
  try {
    const certificate = {};
    for (const [name, length] of Object.entries(FIELDS)) {
      certificate[name] = length ? reader.uint(length) : reader.take(32);
    }
    const award = reader.uint(1);
    if (award > 1) throw new EncodingError(`award is ${award}, neither 0 nor 1`);
    certificate.draw = award ? readDraw(reader) : null;
    certificate.body = reader.data.subarray(start, reader.position);
    const signature = () => ({ key_index: reader.uint(1), signature: reader.take(SIGNATURE_SIZE) });
    certificate.coordinator_signatures = readList(reader, signature);
    return certificate;
  } catch (error) {
    if (error instanceof EncodingError) throw new CertificateError('parse', error.message);
    throw error;
  }
}

function readDraw(reader) {
  return {
    update_hash: reader.take(32),
    params: reader.uint(8),
    loss_reduction: reader.uint(8),
    weight: reader.uint(8),
    index: reader.uint(4),
    siblings: readList(reader, () => ({ hash: reader.take(32), sum: reader.uint(8) })),
  };
}

/** The 32 bytes that the coordinator's keys sign. */
export const certificateSighash = (certificate, chainId) => taggedHash('traincert/certificate', chainId, certificate.body);

export const awardOf = (certificate) => (certificate.draw ? 'drawn' : 'appointed');

/** A certificate in the form of the node's gettrainingcertificate; integers of 64 bits are BigInts. */
export function certificateJson(certificate) {
  const { body: _, draw, ...fields } = certificate;
  const shown = { ...inHex(fields), prev_block: reversedHex(certificate.prev_block), award: awardOf(certificate) };
  shown.coordinator_signatures = certificate.coordinator_signatures.map(inHex);
  if (draw) shown.draw = { ...inHex(draw), siblings: draw.siblings.map(inHex) };
  return shown;
}

const inHex = (fields) => mapValues(fields, (value) => (value instanceof Uint8Array ? hex(value) : value));

const mapValues = (object, change) => Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));
