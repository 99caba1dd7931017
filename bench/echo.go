// A service on Go's defaults that describes the request that it received, like echo.py: go run echo.go PORT.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"sort"
	"strings"
)

var prefixes = []string{
	"X-T-", "Content-Type", "Content-Encoding", "Cookie", "Accept", "Authorization", "Referer", "User-Agent",
}

func describe(writer http.ResponseWriter, request *http.Request) {
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return
	}
	headers := [][2]string{{"host", request.Host}}
	for name, values := range request.Header {
		for _, prefix := range prefixes {
			if strings.HasPrefix(name, prefix) {
				headers = append(headers, [2]string{strings.ToLower(name), strings.Join(values, "|")})
				break
			}
		}
	}
	sort.Slice(headers, func(i, j int) bool { return headers[i][0] < headers[j][0] })
	answer, _ := json.Marshal(map[string]any{
		"method": request.Method, "target": request.RequestURI, "headers": headers,
		"bytes": len(body), "sha": fmt.Sprintf("%x", sha256.Sum256(body)),
	})
	writer.Header().Set("Content-Length", fmt.Sprint(len(answer)))
	writer.Write(answer)
}

func main() {
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], http.HandlerFunc(describe)))
}
