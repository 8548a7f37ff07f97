/* One query, two keys with scores 0 and log 3: weights 1/4 and 3/4. Then its gradient by the value. */
#include <strobe/strobe.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static int near(float got, double expected) { return fabs((double)got - expected) < 1e-5; }

int main(void) {
    float q[] = {1.0f}, k[] = {0.0f, 1.0986123f}, v[] = {8.0f, 4.0f}, out[1], lse[1];
    float dout[] = {1.0f}, dq[1], dk[2], dv[2];
    const int64_t one[] = {1, 1, 1, 1}, two[] = {1, 2, 1, 1}, row[] = {1, 1, 1};

    strobe_attention a;
    strobe_attention_init(&a);
    a.q = strobe_tensor_dense(q, STROBE_F32, STROBE_CPU, 4, one);
    a.k = strobe_tensor_dense(k, STROBE_F32, STROBE_CPU, 4, two);
    a.v = strobe_tensor_dense(v, STROBE_F32, STROBE_CPU, 4, two);

    strobe_backward b;
    strobe_backward_init(&b);
    b.out = strobe_tensor_dense(out, STROBE_F32, STROBE_CPU, 4, one);
    b.lse = strobe_tensor_dense(lse, STROBE_F32, STROBE_CPU, 3, row);
    b.dout = strobe_tensor_dense(dout, STROBE_F32, STROBE_CPU, 4, one);
    b.dq = strobe_tensor_dense(dq, STROBE_F32, STROBE_CPU, 4, one);
    b.dk = strobe_tensor_dense(dk, STROBE_F32, STROBE_CPU, 4, two);
    b.dv = strobe_tensor_dense(dv, STROBE_F32, STROBE_CPU, 4, two);

    strobe_forward f;
    strobe_forward_init(&f);
    f.out = b.out;
    f.lse = b.lse;

    strobe_plan plan;
    plan.struct_size = sizeof plan;
    if (strobe_attention_backward_plan(&a, &b, &plan) != STROBE_OK) {
        printf("plan: %s\n", strobe_last_error());
        return 1;
    }
    size_t bytes = plan.workspace_bytes;
    if (strobe_attention_forward_plan(&a, &f, &plan) != STROBE_OK) {
        printf("plan: %s\n", strobe_last_error());
        return 1;
    }
    if (plan.workspace_bytes > bytes) bytes = plan.workspace_bytes;
    f.workspace = b.workspace = malloc(bytes);
    f.workspace_bytes = b.workspace_bytes = bytes;

    if (strobe_attention_forward(&a, &f, NULL) != STROBE_OK || strobe_attention_backward(&a, &b, NULL) != STROBE_OK) {
        printf("run: %s\n", strobe_last_error());
        return 1;
    }
    free(f.workspace);
    if (!near(out[0], 5.0) || !near(lse[0], log(4.0)) || !near(dv[0], 0.25) || !near(dv[1], 0.75)) {
        printf("out %g, lse %g, dv %g %g\n", out[0], lse[0], dv[0], dv[1]);
        return 1;
    }
    a.v.shape[3] = 2;
    if (strobe_attention_forward(&a, &f, NULL) != STROBE_INVALID_ARGUMENT) {
        printf("a wrong shape was accepted\n");
        return 1;
    }
    printf("strobe %s, %s: %s\n", strobe_version(), plan.implementation, strobe_last_error());
    return 0;
}
