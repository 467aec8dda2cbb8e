// The chain_id that the visitor trusts, in the browser's localStorage. A link can name it: ?chain_id=... But it never replaces another
// one, or any link could make the visitor trust another network.

const NAME = 'traincert-chain-id';

export const isHash = (text) => /^[0-9a-f]{64}$/.test(text);

/** The chain_id that the page's address names, or null. */
export const linkedChainId = () => new URLSearchParams(location.search).get('chain_id')?.trim().toLowerCase() ?? null;

/** The chain_id that the visitor trusts, or null. */
export function trustedChainId() {
  try {
    return localStorage.getItem(NAME);
  } catch {
    return null; // this browser keeps nothing
  }
}

/** Trust a chain_id, or none if it is null. */
export function trust(chainId) {
  if (chainId === null) localStorage.removeItem(NAME);
  else localStorage.setItem(NAME, chainId);
}

/** Trust the chain_id that the page's address names, if the visitor trusts none yet. */
export function trustLink() {
  const linked = linkedChainId();
  if (linked === null || !isHash(linked) || trustedChainId()) return;
  try {
    trust(linked);
  } catch {
    // this browser keeps nothing
  }
}
