// Answers questions to the rules in JavaScript, one as JSON a line on standard input, one answer as JSON a line. Integers that a
// double cannot hold are strings. Run it beside copies of the explorer's folders check/ and vendor/.
import { createInterface } from 'node:readline';

import { blockHash, computeMerkleRoot, parseBlock, txid, winnerSighash } from './check/block.js';
import { certificateJson, certificateSighash, readCertificate } from './check/certificate.js';
import { Reader, concat, fromHex, hex, reversedHex, sha256 } from './check/codec.js';
import { CertificateError } from './check/errors.js';
import { checkContributionWeight, drawTicket, followPath, leafNode } from './check/lottery.js';
import { OptionError, TrainingParams } from './check/params.js';
import { checkBlock } from './check/report.js';
import {
  checkCoordinatorSignatures,
  checkTrainingCertificate,
  contextualCheckTrainingCertificate,
  readTrainingPayload,
} from './check/rules.js';
import { shows } from './check/shown.js';

function paramsOf(options) {
  const values = {};
  for (const option of options) {
    const at = option.indexOf('=');
    (values[option.slice(0, at)] ??= []).push(option.slice(at + 1));
  }
  return TrainingParams.fromNodeOptions(values);
}

/** The reason why a check refuses, or null. */
function reasonOf(check) {
  try {
    check();
    return null;
  } catch (error) {
    if (error instanceof CertificateError) return error.reason;
    throw error;
  }
}

const readAll = (bytes) => {
  const reader = new Reader(bytes);
  const certificate = readCertificate(reader);
  if (reader.left()) throw new Error(`${reader.left()} bytes after the certificate`);
  return certificate;
};

/** The first broken rule of those that are the node's, in a report that goes on. */
const firstBroken = ({ rows }) => rows.find(({ rule, good }) => good === false && rule.startsWith('bad-'))?.rule ?? null;

const answers = {
  chainId({ options }) {
    try {
      return { chain_id: hex(paramsOf(options).chainId) };
    } catch (error) {
      if (error instanceof OptionError) return { error: error.message };
      throw error;
    }
  },
  certificate({ bytes, chain_id: chainId }) {
    const certificate = readAll(fromHex(bytes));
    return { ...certificateJson(certificate), sighash: hex(certificateSighash(certificate, fromHex(chainId))) };
  },
  block({ bytes, height, options }) {
    const block = parseBlock(fromHex(bytes));
    return reasonOf(() => checkTrainingCertificate(block, height, paramsOf(options)));
  },
  winnerSighash({ bytes, options }) {
    const block = parseBlock(fromHex(bytes));
    return hex(winnerSighash(block, readTrainingPayload(block.transactions[0]).output, paramsOf(options).chainId));
  },
  withParent({ certificate_hex: own, parent_body_hex: body, time, parent_time: parentTime, options }) {
    const params = paramsOf(options);
    const certificate = readAll(fromHex(own));
    checkCoordinatorSignatures(certificate, params.keysAt(certificate.height), params.chainId);
    const parent = body ? readAll(concat(fromHex(body), [0])) : null;
    return reasonOf(() => contextualCheckTrainingCertificate(certificate, parent, time, parentTime, params));
  },
  // A block with its parent's certificate: the node's verdict.
  verdict({ bytes, height, parent, parent_time: parentTime, options }) {
    const params = paramsOf(options);
    const block = parseBlock(fromHex(bytes));
    return reasonOf(() => {
      const { certificate } = checkTrainingCertificate(block, height, params);
      contextualCheckTrainingCertificate(certificate, parent && readAll(fromHex(parent)), block.time, parentTime, params);
    });
  },
  // The same for a chain of blocks, of which the last is checked: its report, as the page has it.
  async report({ blocks, hash, height, options }) {
    const byHash = new Map(blocks.map(fromHex).map((bytes) => [blockHash(bytes), bytes]));
    const fetchBlock = async (each) => byHash.get(each);
    const report = await checkBlock(hash, height, options && paramsOf(options), fetchBlock);
    return { ...report, first: firstBroken(report) };
  },
  merkle({ bytes }) {
    const { transactions } = parseBlock(fromHex(bytes));
    return { ids: transactions.map((each) => reversedHex(txid(each))), ...rootOf(transactions.map(txid)) };
  },
  merkleOf: ({ hashes }) => rootOf(hashes.map(fromHex)),
  path({ number, index, count, siblings }) {
    const key = fromHex(index.toString(16).padStart(64, '0'));
    const [params, lossReduction, weight] = [number, number, number].map(BigInt);
    const leaf = leafNode(key, { update_hash: sha256(key), params, loss_reduction: lossReduction, weight });
    const nodes = siblings.map((node) => ({ hash: fromHex(node.hash), sum: BigInt(node.sum) }));
    const { root, start } = followPath(leaf, index, count, nodes);
    return { root: hex(root.hash), weight: root.sum, start };
  },
  ticket({ beacon_reveal: reveal, prev_block: prevBlock, round, contributions_weight: weight }) {
    return drawTicket(fromHex(reveal), fromHex(prevBlock).reverse(), round, BigInt(weight));
  },
  isWeight: ({ params, loss_reduction: lossReduction, weight }) =>
    checkContributionWeight(BigInt(params), BigInt(lossReduction), BigInt(weight)),
  shows: ({ text, value, name }) => shows(text, value, name),
};

function rootOf(hashes) {
  const { root, mutated } = computeMerkleRoot(hashes);
  return { root: hex(root), mutated };
}

for await (const line of createInterface({ input: process.stdin })) {
  const { question, ...details } = JSON.parse(line);
  const answer = await answers[question](details);
  console.log(JSON.stringify(answer, (_, value) => (typeof value === 'bigint' ? String(value) : value)));
}
