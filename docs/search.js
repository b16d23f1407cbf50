// A page that is opened from a folder may not start a Worker; the search then runs in a hidden frame, which does the same.
if (location.protocol === "file:") {
  const SETUP = `
    self.postMessage = (data) => parent.dispatchEvent(new MessageEvent("message", { data, source: self }));
    self.importScripts = (...urls) => urls.reduce((before, src) => before.then(() => new Promise((done, failed) => {
      document.body.append(Object.assign(document.createElement("script"), { src, onload: done, onerror: failed }));
    })), Promise.resolve());`;
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true });
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      addEventListener("message", (event) => {
        if (event.source !== inside) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        if (this.onmessage) this.onmessage(event);
      });
      inside.document.open();
      inside.document.write(`<!doctype html><body><script>${SETUP}<\/script><script src="${url}"><\/script>`);
      this.ready = new Promise((loaded) => inside.addEventListener("load", loaded));
      inside.document.close();
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
