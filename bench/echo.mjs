// A service on Node's defaults that describes the request that it received, like echo.py: node echo.mjs PORT.
import { createHash } from "node:crypto";
import { createServer } from "node:http";

const PREFIXES = ["x-t-", "host", "content-type", "content-encoding", "cookie", "accept", "authorization", "referer", "user-agent"];

createServer((request, response) => {
  const digest = createHash("sha256");
  let bytes = 0;
  request.on("data", (chunk) => {
    digest.update(chunk);
    bytes += chunk.length;
  });
  request.on("end", () => {
    const headers = [];
    for (let place = 0; place < request.rawHeaders.length; place += 2) {
      const name = request.rawHeaders[place].toLowerCase();
      if (PREFIXES.some((prefix) => name.startsWith(prefix))) headers.push([name, request.rawHeaders[place + 1]]);
    }
    headers.sort();
    const answer = JSON.stringify({ method: request.method, target: request.url, headers, bytes, sha: digest.digest("hex") });
    response.writeHead(200, { "Content-Length": Buffer.byteLength(answer) });
    response.end(answer);
  });
}).listen(Number(process.argv[2]), "127.0.0.1");
