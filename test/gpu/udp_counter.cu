// SPDX-License-Identifier: MIT
// A server on UDP that keeps a counter in device memory: every packet increments it on the GPU and is answered with the new value.
//
// Usage: udp_counter [PORT]     (0: any; it prints "port N")
#include <arpa/inet.h>
#include <cuda_runtime.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

__device__ int counter = 100;

__global__ void increment()
{
    counter++;
}

int main(int argc, char **argv)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in at = {}, from;
    socklen_t len = sizeof(at);
    at.sin_family = AF_INET;
    at.sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 10000));
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof(at)) != 0 || getsockname(fd, (struct sockaddr *)&at, &len) != 0) {
        perror("udp_counter");
        return 1;
    }
    cudaError_t rc = cudaFree(NULL);
    if (rc != cudaSuccess) {
        fprintf(stderr, "udp_counter: %s\n", cudaGetErrorString(rc));
        return 1;
    }
    printf("port %d\n", ntohs(at.sin_port));
    fflush(stdout);
    for (;;) {
        char packet[16];
        int value = 0;
        len = sizeof(from);
        ssize_t n = recvfrom(fd, packet, sizeof(packet), 0, (struct sockaddr *)&from, &len);
        if (n < 0)
            continue;
        increment<<<1, 1>>>();
        rc = cudaMemcpyFromSymbol(&value, counter, sizeof(value));
        if (rc != cudaSuccess) {
            fprintf(stderr, "udp_counter: %s\n", cudaGetErrorString(rc));
            return 1;
        }
        n = snprintf(packet, sizeof(packet), "%d\n", value);
        sendto(fd, packet, (size_t)n, 0, (struct sockaddr *)&from, len);
    }
}
