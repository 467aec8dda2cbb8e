// The consensus rules: all checks of SPEC.md, of a block alone and of a block with its parent.
//
// This is the twin of bridge/consensus/rules.py and of bitcoind-patch/src/training/validation.cpp: one function for each rule, with
// the same names in the same order, so that all three can be read side by side. A check returns what it found, in words, or throws
// CertificateError with the rule's reason.

import { payloadScript, pushAfterReturn, winnerSighash } from './block.js';
import { SIGNATURE_SIZE, awardOf, certificateSighash, readCertificate } from './certificate.js';
import { Reader, equal, hex, isZero, reversedHex, sha256, verifySchnorr } from './codec.js';
import { CertificateError } from './errors.js';
import { checkContributionWeight, drawTicket, followPath, leafNode } from './lottery.js';

const PAYLOAD_MAGIC = new TextEncoder().encode('TCRT');

/** What a script pushes, if it is OP_RETURN and a push that starts with the magic; else null. */
function matchPayload(script) {
  const data = pushAfterReturn(script);
  return data !== null && equal(data.subarray(0, PAYLOAD_MAGIC.length), PAYLOAD_MAGIC) ? data : null;
}

/**
 * Find and decode the payload of a coinbase: {certificate, winnerSignature, output}, output is the number of the one that has it.
 *
 * Throws CertificateError: -missing, -multiple, -parse or -version.
 */
export function readTrainingPayload(coinbase) {
  const found = [];
  coinbase.outputs.forEach(({ script }, output) => {
    const push = matchPayload(script);
    if (push) found.push({ output, script, push });
  });
  if (found.length === 0) throw new CertificateError('missing', 'no coinbase output carries a training certificate');
  if (found.length > 1) {
    throw new CertificateError('multiple', `coinbase outputs ${found[0].output} and ${found[1].output} both carry a certificate`);
  }
  const { output, script, push } = found[0];
  if (!equal(script, payloadScript(push))) {
    throw new CertificateError('parse', `coinbase output ${output} is not OP_RETURN and one minimal push`);
  }
  const reader = new Reader(push);
  reader.take(PAYLOAD_MAGIC.length);
  const certificate = readCertificate(reader);
  if (reader.left() !== SIGNATURE_SIZE) {
    throw new CertificateError('parse', `${reader.left()} bytes after the certificate, expected ${SIGNATURE_SIZE}`);
  }
  return { certificate, winnerSignature: reader.take(SIGNATURE_SIZE), output };
}

/** Rule bad-traincert-height. */
export function checkHeight(certificate, height) {
  if (certificate.height !== height) {
    throw new CertificateError('height', `height ${certificate.height} in a block at height ${height}`);
  }
  return `height ${height}`;
}

/** Rule bad-traincert-prevblock. */
export function checkPrevBlock(certificate, block) {
  const found = reversedHex(certificate.prev_block);
  if (!equal(certificate.prev_block, block.prevBlock)) {
    throw new CertificateError('prevblock', `previous block ${found}, but the header's is ${reversedHex(block.prevBlock)}`);
  }
  return `previous block ${found}`;
}

/** Rule bad-traincert-totals. */
export function checkTotals(certificate) {
  const noRoot = isZero(certificate.contributions_root);
  const noWeight = certificate.contributions_weight === 0n;
  const noCount = certificate.contributions_count === 0;
  const found = `${certificate.contributions_count} contributions of total weight ${certificate.contributions_weight}`;
  if (noRoot !== noWeight || noWeight !== noCount) {
    throw new CertificateError('totals', `${found}, and a root that is ${noRoot ? '' : 'not '}zero`);
  }
  return found;
}

/** Rule bad-traincert-coordinator-sig. */
export function checkCoordinatorSignatures(certificate, keys, chainId) {
  const signatures = certificate.coordinator_signatures;
  const indices = signatures.map((each) => each.key_index);
  if (indices.length !== keys.threshold) {
    throw new CertificateError('coordinator-sig', `${indices.length} signatures, expected ${keys.threshold}`);
  }
  const ascending = indices.every((index, i) => i === 0 || index > indices[i - 1]);
  if (!ascending || indices.at(-1) >= keys.keys.length) {
    throw new CertificateError('coordinator-sig', `key indices ${indices.join(', ')} of ${keys.keys.length} keys`);
  }
  const message = certificateSighash(certificate, chainId);
  for (const { key_index: index, signature } of signatures) {
    if (!verifySchnorr(keys.keys[index], message, signature)) {
      throw new CertificateError('coordinator-sig', `signature of key ${index} does not verify`);
    }
  }
  return `signatures of keys ${indices.join(', ')}: ${keys.threshold} of ${keys.keys.length} are needed`;
}

/** Rule bad-traincert-winner-sig. */
export function checkWinnerSignature(payload, block, chainId) {
  const message = winnerSighash(block, payload.output, chainId);
  if (!verifySchnorr(payload.certificate.winner_key, message, payload.winnerSignature)) {
    throw new CertificateError('winner-sig', "the winner's signature does not verify");
  }
  return `signature of key ${hex(payload.certificate.winner_key)}`;
}

/** Runs one rule's check as the node does: the first rule that does not hold ends all. */
const stopAtFirst = (_, check) => check();

/**
 * Check the block alone: all that its certificate must fulfil by itself. Returns the payload.
 *
 * `rule(reason, check)` runs each check. By default this throws CertificateError for the first rule that does not hold. Another
 * one may note it and go on: it must return null where the check of `payload` throws.
 */
export function checkTrainingCertificate(block, height, params, rule = stopAtFirst) {
  const payload = rule('payload', () => readTrainingPayload(block.transactions[0]));
  if (payload === null) return null;
  const { certificate } = payload;
  rule('height', () => checkHeight(certificate, height));
  rule('prevblock', () => checkPrevBlock(certificate, block));
  rule('totals', () => checkTotals(certificate));
  rule('coordinator-sig', () => checkCoordinatorSignatures(certificate, params.keysAt(height), params.chainId));
  rule('winner-sig', () => checkWinnerSignature(payload, block, params.chainId));
  return payload;
}

/** Rule bad-traincert-award. */
export function checkAward(certificate, parent) {
  const tableWeight = parent ? parent.contributions_weight : 0n;
  const award = awardOf(certificate);
  if ((certificate.draw !== null) !== tableWeight > 0n) {
    throw new CertificateError('award', `${award}, but the parent's table has weight ${tableWeight}`);
  }
  return `${award}: the parent's table has weight ${tableWeight}`;
}

/** Rule bad-traincert-weight. */
export function checkWeight(draw) {
  const work = `${draw.params} parameters and a loss reduction of ${draw.loss_reduction}`;
  if (draw.weight < 1n || !checkContributionWeight(draw.params, draw.loss_reduction, draw.weight)) {
    throw new CertificateError('weight', `${draw.weight} is not the weight of ${work}`);
  }
  return `${draw.weight} is the weight of ${work}`;
}

/** Rule bad-traincert-draw. */
export function checkDraw(certificate, draw, parent) {
  const leaf = leafNode(certificate.winner_key, draw);
  const path = followPath(leaf, draw.index, parent.contributions_count, draw.siblings);
  if (path === null || !equal(path.root.hash, parent.contributions_root) || path.root.sum !== parent.contributions_weight) {
    throw new CertificateError('draw', "the path does not end at the parent's root and total weight");
  }
  const ticket = drawTicket(certificate.beacon_reveal, certificate.prev_block, certificate.round, parent.contributions_weight);
  const { start } = path;
  if (ticket < start || ticket >= start + draw.weight) {
    throw new CertificateError('draw', `ticket ${ticket} is not among the ${draw.weight} from ${start} on`);
  }
  return `ticket ${ticket} of ${parent.contributions_weight} is among the ${draw.weight} from ${start} on`;
}

/** Rule bad-traincert-beacon. */
export function checkBeacon(certificate, parent, params) {
  const beacon = sha256(certificate.beacon_reveal);
  const expected = parent ? parent.beacon_reveal : params.beacon;
  if (!equal(beacon, expected)) {
    throw new CertificateError('beacon', `the reveal's hash is ${hex(beacon)}, expected ${hex(expected)}`);
  }
  return `the reveal's hash is ${hex(beacon)}`;
}

/** Rule bad-traincert-model. */
export function checkModel(certificate, parent, params) {
  const found = `starts from model ${hex(certificate.model_before)}`;
  const expected = parent ? parent.model_after : params.model;
  if (!equal(certificate.model_before, expected)) throw new CertificateError('model', `${found}, expected ${hex(expected)}`);
  return found;
}

/** Rule bad-traincert-round. */
export function checkRound(certificate, time, parentTime, params) {
  const earliest = parentTime + certificate.round * params.roundSeconds;
  const found = `round ${certificate.round} at time ${time}`;
  if (certificate.round && time < earliest) throw new CertificateError('round', `${found}, allowed from ${earliest} on`);
  return found;
}

/**
 * Check a block with its parent: the draw is fair, beacon and lineage are unbroken, no redraw came too early.
 *
 * `parent` is the parent's certificate, null at the start height. `time` and `parentTime` are the nTime of the two blocks. `rule`
 * is as above.
 */
export function contextualCheckTrainingCertificate(certificate, parent, time, parentTime, params, rule = stopAtFirst) {
  rule('award', () => checkAward(certificate, parent));
  if (parent?.contributions_weight && certificate.draw) {
    rule('weight', () => checkWeight(certificate.draw));
    rule('draw', () => checkDraw(certificate, certificate.draw, parent));
  }
  rule('beacon', () => checkBeacon(certificate, parent, params));
  rule('model', () => checkModel(certificate, parent, params));
  rule('round', () => checkRound(certificate, time, parentTime, params));
}
