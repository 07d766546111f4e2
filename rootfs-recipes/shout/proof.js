// The proof of both images: shout serves its page and all that this asks for, its socket opens as a browser opens it,
// and by that socket it brings somebody to an IRC server, which is this program as well. Prints "proved".
"use strict";

const assert = require("assert");
const crypto = require("crypto");
const http = require("http");
const net = require("net");
const readline = require("readline");
const { spawn } = require("child_process");

const PORT = 9000;
const HERE = { host: "127.0.0.1", port: PORT };
const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** Fetch a path: {status, type, body}. */
function get(path) {
  return new Promise((resolve, reject) => {
    http.get({ ...HERE, path, agent: false }, (answer) => {
      const parts = [];
      answer.on("data", (part) => parts.push(part));
      answer.on("end", () => {
        const body = Buffer.concat(parts).toString("latin1");
        resolve({ status: answer.statusCode, type: answer.headers["content-type"], body });
      });
    }).on("error", reject);
  });
}

/** Fetch the page as soon as there is somebody who serves it. */
async function page() {
  for (;;) {
    try {
      return await get("/");
    } catch (error) {
      assert.strictEqual(error.code, "ECONNREFUSED");
      await sleep(50);
    }
  }
}

/** Open a websocket and hand over each text that comes; returns what sends one (RFC 6455, texts under 126 bytes). */
function websocket(path, receive) {
  const key = crypto.randomBytes(16).toString("base64");
  const accept = crypto.createHash("sha1").update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");
  const headers = {
    Connection: "Upgrade", Upgrade: "websocket", "Sec-WebSocket-Version": 13, "Sec-WebSocket-Key": key,
  };
  return new Promise((resolve, reject) => {
    const request = http.request({ ...HERE, path, headers, agent: false });
    request.on("upgrade", (answer, socket, head) => {
      assert.strictEqual(answer.headers["sec-websocket-accept"], accept);
      let data = head;
      const take = () => {
        while (data.length >= 2) {
          const long = { 126: 2, 127: 8 }[data[1]] || 0;
          if (data.length < 2 + long) return;
          const length = long ? data.readUIntBE(long === 8 ? 4 : 2, long === 8 ? 6 : 2) : data[1];
          if (data.length < 2 + long + length) return;
          receive(data.toString("utf8", 2 + long, 2 + long + length));
          data = data.subarray(2 + long + length);
        }
      };
      socket.on("data", (more) => {
        data = Buffer.concat([data, more]);
        take();
      });
      take();
      resolve((text) => {
        const bytes = Buffer.from(text);
        assert(bytes.length < 126);
        // A client has to mask what it sends; a mask of zeros changes nothing.
        socket.write(Buffer.concat([Buffer.from([0x81, 0x80 | bytes.length, 0, 0, 0, 0]), bytes]));
      });
    });
    request.on("response", (answer) => reject(new Error(`no websocket, but status ${answer.statusCode}`)));
    request.on("error", reject);
    request.end();
  });
}

/** An IRC server for one: [its port, the lines that it has heard]. */
function ircServer() {
  const lines = [];
  const answers = { USER: ":here 001 lab :Welcome\r\n", PING: ":here PONG here :127.0.0.1\r\n" };
  const server = net.createServer((socket) => {
    readline.createInterface({ input: socket }).on("line", (line) => {
      lines.push(line.trim());
      socket.write(answers[line.split(" ")[0]] || "");
    });
  });
  return new Promise((done) => server.listen(0, "127.0.0.1", () => done([server.address().port, lines])));
}

async function main() {
  const shout = spawn("shout", ["--home", "/tmp/shout", "--public", "--port", String(PORT)], { stdio: "inherit" });
  process.on("exit", () => shout.removeAllListeners().kill());
  shout.on("error", (error) => assert.fail(error));
  shout.on("exit", (status) => assert.fail(`shout has ended with exit status ${status}`));

  const first = await page();
  assert.strictEqual(first.status, 200);
  assert.match(first.body, /<title>Shout<\/title>/);
  assert.match(first.body, /<body class="public">/);
  const links = [...first.body.matchAll(/(?:src|href)="([a-z/][^":]*)"/g)].map((found) => found[1]);
  const styles = await get("/css/style.css");
  const fonts = [...styles.body.matchAll(/url\('?([^'")]*\.woff)'?\)/g)].map((found) => `css/${found[1]}`);
  assert(links.length >= 6 && fonts.length >= 5, `${links} ${fonts}`);
  for (const link of [...links, ...fonts, "socket.io/socket.io.js"]) {
    const { status, body } = await get(`/${link.replace(/^\//, "")}`);
    assert(status === 200 && body.length > 0, `${link}: status ${status}`);
  }

  const polled = await get("/socket.io/?EIO=3&transport=polling");
  assert.match(polled.body, /"upgrades":\["websocket"\]/);

  const [port, lines] = await ircServer();
  const texts = [];
  const send = await websocket("/socket.io/?EIO=3&transport=websocket", (text) => texts.push(text));
  while (!texts.some((text) => text.startsWith('42["init"'))) await sleep(20);
  assert(texts[0].startsWith('0{"sid":') && texts[1] === "40", texts.join(" "));
  send(`42${JSON.stringify(["conn", { host: "127.0.0.1", port, nick: "lab", username: "lab", join: "#here" }])}`);
  while (!lines.includes("JOIN #here")) await sleep(20);
  assert(lines.includes("NICK lab"), lines.join());

  console.log("proved");
  process.exit(0);
}

process.on("unhandledRejection", (error) => {
  console.error(error);
  process.exit(1);
});
setTimeout(() => assert.fail("shout has not done its part in a minute"), 60000);
main();
