/* A forward pass through strobe.h, with nothing but the installed package. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <strobe/strobe.h>

int main(void) {
    const int64_t tokens[] = {1, 2, 1, 2}, rows[] = {1, 1, 2};
    float q[4] = {0}, k[4] = {0}, v[4] = {1, 10, 3, 30}, out[4], lse[2];
    strobe_attention attention;
    strobe_forward forward;
    strobe_plan plan = {.struct_size = sizeof plan};

    strobe_attention_init(&attention);
    strobe_forward_init(&forward);
    attention.q = strobe_tensor_dense(q, STROBE_F32, STROBE_CPU, 4, tokens);
    attention.k = strobe_tensor_dense(k, STROBE_F32, STROBE_CPU, 4, tokens);
    attention.v = strobe_tensor_dense(v, STROBE_F32, STROBE_CPU, 4, tokens);
    forward.out = strobe_tensor_dense(out, STROBE_F32, STROBE_CPU, 4, tokens);
    forward.lse = strobe_tensor_dense(lse, STROBE_F32, STROBE_CPU, 3, rows);

    if (strobe_attention_forward_plan(&attention, &forward, &plan) != STROBE_OK) goto failed;
    forward.workspace_bytes = plan.workspace_bytes;
    forward.workspace = malloc(plan.workspace_bytes + 1);
    if (strobe_attention_forward(&attention, &forward, NULL) != STROBE_OK) goto failed;
    free(forward.workspace);

    for (int i = 0; i < 2; ++i) {
        if (fabsf(out[2 * i] - 2) > 1e-5f || fabsf(out[2 * i + 1] - 20) > 1e-4f || fabsf(lse[i] - logf(2)) > 1e-6f) {
            fprintf(stderr, "row %d is %g %g, lse %g\n", i, out[2 * i], out[2 * i + 1], lse[i]);
            return 1;
        }
    }
    printf("strobe %s, %s: good\n", strobe_version(), plan.implementation);
    return 0;

failed:
    fprintf(stderr, "%s\n", strobe_last_error());
    return 1;
}
