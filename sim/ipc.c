/* SPDX-License-Identifier: MIT */

/* Memory shared by legacy IPC handles. */

#include "sim.h"
