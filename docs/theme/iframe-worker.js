// The search runs in a worker. Browsers start none for a page that was opened as a file, so there it runs in a hidden frame.
// Messages are copied, as for a worker. Otherwise the search would change the query that the page still shows.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.ready = new Promise((resolve) => { this.frame.onload = resolve })
      this.ready.then(() => {
        this.frame.contentWindow.postMessage = (data) => this.onmessage?.({ data: structuredClone(data) })
      })
      this.frame.srcdoc = `<script src="${new URL(url, location)}"><\/script>`
      document.documentElement.append(this.frame)
    }

    async postMessage(data) {
      await this.ready
      this.frame.contentWindow?.onmessage({ data: structuredClone(data) })
    }

    terminate() {
      this.frame.remove()
    }
  }
}
