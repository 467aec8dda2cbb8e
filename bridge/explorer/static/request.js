// Requests that are made again.

const REST = 1000; // milliseconds

/** Fetch, and once more if there is no answer: a browser gives requests up when the network of its machine changes. */
export async function request(address, options) {
  try {
    return await fetch(address, options);
  } catch {
    await new Promise((resolve) => setTimeout(resolve, REST));
    return fetch(address, options);
  }
}
