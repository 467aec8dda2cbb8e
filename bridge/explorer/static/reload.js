// Loads the page again if a script or a style of it did not load: a browser gives requests up when the network of its machine changes.
// The pages have this text in themselves, so that it needs no request.
{
  const TRIES = 3;
  const REST = 1000; // milliseconds
  const tries = history.state?.tries ?? 0; // it stays when the page is loaded again

  const isPart = (target) => target instanceof Element && target.matches('script, link[rel="stylesheet"]');

  function retry() {
    if (tries === TRIES) {
      document.getElementById('unloaded').hidden = false;
      return;
    }
    history.replaceState({ tries: tries + 1 }, '');
    location.reload();
  }

  addEventListener('error', ({ target }) => isPart(target) && setTimeout(retry, REST), true);
}
